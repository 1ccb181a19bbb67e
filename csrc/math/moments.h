// Count, mean, sum of squared deviations, minimum and maximum of a stream of values: Welford's update, Chan's merge.
// Host and device. A default one is the identity of merge.
#pragma once

#include "math/dtype.h"

namespace lipcore {

struct Moments {
  double count = 0;
  double mean = 0;
  double m2 = 0;   // sum (x - mean)^2
  double min = 0;  // meaningless while count == 0
  double max = 0;
};

LIPCORE_INLINE void observe(Moments* m, double x) {
  m->min = m->count == 0 || x < m->min ? x : m->min;
  m->max = m->count == 0 || x > m->max ? x : m->max;
  m->count += 1;
  const double deviation = x - m->mean;
  m->mean += deviation / m->count;
  m->m2 += deviation * (x - m->mean);
}

LIPCORE_INLINE void merge(Moments* into, const Moments& from) {
  if (from.count == 0) return;
  if (into->count == 0) {
    *into = from;
    return;
  }
  const double count = into->count + from.count;
  const double difference = from.mean - into->mean;
  into->mean += difference * (from.count / count);
  into->m2 += from.m2 + difference * difference * (into->count * from.count / count);
  into->min = from.min < into->min ? from.min : into->min;
  into->max = from.max > into->max ? from.max : into->max;
  into->count = count;
}

}  // namespace lipcore
