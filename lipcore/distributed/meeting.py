"""Ranks that meet in the store before a collective starts: all of them, for the same thing, or none.

A collective that not all ranks join never ends, and one that is given up is paired with whatever the training sends
next. So none is started before every rank has said here what it is about to do. Whether a meeting takes place is
decided once, by whoever writes the decision first: the last rank that comes, or the first that gives up.
"""

from __future__ import annotations

import hashlib
import json
import time
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_GO, _STOP = "go", "stop: "
_LOOK_AROUND = 0.25  # seconds between looks at what missing ranks do
_LONGEST_PAUSE = 0.02  # seconds
_MANY = 64  # ranks; of more each looks rarer, so that the store serves as many questions a second
_LOOKED_AT = 16  # missing ranks that one rank looks at in a time; beside it others look at others

Header = dict[str, Any]


class Meeting:
    """The place in a store where ranks meet, again and again. Each of them makes one of these per process group.

    Args:
        store: what all ranks can write to, a torch.distributed.Store.
        name: the same on all ranks, and nobody else's.
        place: this rank's place among them.
        ranks: their numbers.
    """

    def __init__(self, store: Any, name: str, place: int, ranks: Sequence[int]) -> None:
        self._store, self._place, self._ranks = store, place, list(ranks)
        # A store may outlive a process group: what was written for that one is not read again.
        self._name = f"{name}/{store.add(f'{name}/made/{place}', 1)}"
        self._attempts: Counter[int] = Counter()  # by step
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._numbered = 0
        self._passed: dict[int, tuple[int, int]] = {}  # by caller: a step, and how often it has passed by at it
        self._old: list[str] = []  # keys of the last meeting that took place, which nobody needs when the next one does
        self.kept: list[Any] = []  #: memory in which the ranks make their collectives; as large on all of them

    def number_of(self, caller: Any) -> int:
        """Return the number of a Monitor or metric that meets others here, in the order of their first calls: steps of
        one say nothing of those of another."""
        if caller not in self._numbers:
            self._numbers[caller], self._numbered = self._numbered, self._numbered + 1
        return self._numbers[caller]

    def pass_by(self, what: str, step: int, who: int = 0) -> None:
        """Tell ranks that wait for this one that it has nothing to meet them for at this step; `who` calls."""
        times = self._times_passed(step, who) + 1
        self._passed[who] = step, times
        word = {"key": "", "step": step, "what": what, "who": who, "times": times}
        self._store.set(self._at(self._place), json.dumps(word))

    def _times_passed(self, step: int, who: int) -> int:
        """Return how often this rank has passed by at a step: the others have too, in the same calls."""
        at, times = self._passed.get(who, (step, 0))
        return times if at == step else 0

    def go_back(self) -> None:
        """Take back that this rank has passed by: a checkpoint was loaded, and steps are made again."""
        self._passed.clear()
        self._store.set(self._at(self._place), "")

    def leave_word(self, where: str, word: str, over: str = "") -> str:
        """Leave a word for all ranks in the place of this one, "" for none, unless another stands there; return the one
        that stands."""
        standing: bytes = self._store.compare_set(f"{self._name}/word/{where}", over, word)
        return standing.decode()

    def word(self, where: str) -> str:
        """Return the word that a rank has left; "" where none has."""
        key = f"{self._name}/word/{where}"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def meet(self, what: str, step: int, header: Header, timeout: float, who: int = 0) -> list[Header]:
        """Return the headers of all ranks, when all of them have come.

        Args:
            what: it is about, in words.
            step: of the training; ranks meet for the same step.
            header: what this rank has to say, JSON-ready.
            timeout: seconds to wait for the others.
            who: the number of the caller, see :meth:`number_of`.

        Raises:
            RuntimeError: a rank has not come in time, is waiting for something else, or had given up before this one
                came. The message names it, and says what is so of this rank. No rank goes on then.
        """
        key = f"{self._name}/{step}/{self._attempts[step]}"
        self._attempts[step] += 1
        text = json.dumps(header, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        kind, words = f"{key}/of/{digest}", f"{key}/text/{digest}"
        start = time.monotonic()
        self._store.set(words, text)
        self._store.append(f"{key}/came", f"{self._place}:{digest};")
        self._store.set(self._at(self._place), json.dumps({"key": key, "step": step, "what": what}))
        self._store.add(kind, 1)
        try:
            if self._store.add(f"{key}/arrived", 1) == len(self._ranks):
                decision = self._decide(key, _GO)
            else:
                decision = self._wait(key, what, step, timeout, who)
        finally:
            self._store.set(self._at(self._place), "")
        if decision != _GO:
            stop = json.loads(decision.removeprefix(_STOP))
            raise RuntimeError(f"lipcore: {self._told(stop, what, time.monotonic() - start)}")
        same = self._store.add(kind, 0) == len(self._ranks)
        self._attempts = Counter({step: self._attempts[step]})
        of_all = [f"{key}/{what}" for what in ("arrived", "decision", "came")]
        self._forget([words, kind, *(of_all if self._place == 0 else [])])
        return [header] * len(self._ranks) if same else self._headers(key)

    def _at(self, place: int) -> str:
        return f"{self._name}/at/{place}"

    def _came(self, key: str) -> dict[int, str]:
        """Return which ranks have come, by their places, and the digests of their headers: one question to the store,
        however many they are."""
        if not self._store.check([f"{key}/came"]):
            return {}
        pairs = self._store.get(f"{key}/came").decode().split(";")[:-1]
        return {int(place): digest for place, _, digest in (pair.partition(":") for pair in pairs)}

    def _headers(self, key: str) -> list[Header]:
        """Return the headers of all ranks; each of those that are different is read once."""
        came = self._came(key)
        texts = {digest: json.loads(self._store.get(f"{key}/text/{digest}")) for digest in set(came.values())}
        return [texts[came[i]] for i in range(len(self._ranks))]

    def _decide(self, key: str, decision: str) -> str:
        """Write the decision, unless there is one; return the one that stands."""
        stands: bytes = self._store.compare_set(f"{key}/decision", "", decision)
        return stands.decode()

    def _wait(self, key: str, what: str, step: int, timeout: float, who: int) -> str:
        start = time.monotonic()
        rarer = max(1.0, len(self._ranks) / _MANY)
        look = start if rarer == 1 else start + rarer * _LOOK_AROUND * self._place / len(self._ranks)
        pause = 1e-4
        while not self._store.check([f"{key}/decision"]):
            now = time.monotonic()
            if now - start > timeout:
                return self._decide(key, self._giving_up(key, what, timeout))
            if now >= look:
                look = now + rarer * _LOOK_AROUND
                if elsewhere := self._waiting_elsewhere(key, step, who):
                    why = _STOP + json.dumps({"why": self._apart(what, step, elsewhere)})
                    decision = self._decide(key, why)
                    if decision == why:  # else a missing rank came meanwhile, and has gone on since
                        for other in {place["key"] for place in elsewhere.values() if place["key"]}:
                            self._decide(other, why)  # which waits for this rank in vain
                    return decision
            time.sleep(pause)
            pause = min(1.5 * pause, rarer * _LONGEST_PAUSE)
        return self._decide(key, _STOP)  # there is one

    def _missing(self, key: str) -> list[int]:
        came = self._came(key)
        return [i for i in range(len(self._ranks)) if i != self._place and i not in came]

    def _waiting_elsewhere(self, key: str, step: int, who: int) -> dict[int, Mapping[str, Any]]:
        """Return where ranks are that will not come, by their places: waiting for something else, or past this
        step. Of many that are missing it looks at those behind its own place."""
        found = {}
        missing = self._missing(key)
        behind = sum(i < self._place for i in missing)
        for i in (missing[behind:] + missing[:behind])[:_LOOKED_AT]:
            if not self._store.check([self._at(i)]) or not (text := self._store.get(self._at(i))):
                continue
            place = json.loads(text)
            waits = place["key"] not in ("", key) and not self._store.check([f"{place['key']}/decision"])
            # What another Monitor had last to say, whose training may be over, is no word of this one.
            passed = not place["key"] and place["who"] == who
            # At the same step it may have passed by in a call before, as this rank has, and be on its way to this one.
            at = place["step"], place.get("times", 0)
            if waits or (passed and at > (step, self._times_passed(step, who))):
                found[i] = place
        return found

    def _apart(self, what: str, step: int, elsewhere: Mapping[int, Mapping[str, Any]]) -> str:
        others = "; ".join(
            f"rank {self._ranks[i]} is at step {place['step']}, {place['what']}" for i, place in elsewhere.items()
        )
        return (
            f"ranks are at different places: rank {self._ranks[self._place]} is at step {step}, {what}; {others}. No "
            "collective was started. All ranks have to make this call at the same step, with the same windows"
        )

    def _giving_up(self, key: str, what: str, timeout: float) -> str:
        """Return the decision of a rank that has waited long enough, as all ranks read it."""
        missing = self._missing(key)
        never = [i for i in missing if not self._store.check([self._at(i)])]
        facts = {"by": self._place, "what": what, "waited": timeout, "missing": missing, "never": never}
        return _STOP + json.dumps(facts)

    def _told(self, stop: Mapping[str, Any], what: str, waited: float) -> str:
        """Return why the ranks did not meet, as it is for this one: it gave up, waited when another did, or is late."""
        if "why" in stop:
            return str(stop["why"])
        here, other, missing = self._named([self._place]), self._named([stop["by"]]), self._named(stop["missing"])
        gave_up = f"{stop['waited']:g} s"
        if self._place in stop["missing"]:
            at = f" at {stop['what']}" if stop["what"] != what else ""
            said = f"{here} has come too late: {other} had waited {gave_up}{at} for {missing}, and given up"
        else:
            note = f" ({self._named(stop['never'])} never called it)" if stop["never"] else ""
            mine, end = (gave_up, " and") if stop["by"] == self._place else (f"{waited:.3g} s", f", and {other}")
            after = f" after {gave_up}" if stop["by"] != self._place else ""
            said = f"{here} has waited {mine} for {missing}{note}{end} gave up{after}"
        return (
            f"{what}: {said}. No collective was started; this rank's own numbers can be read. Every rank of the group "
            "has to make this call at the same step; where one is slower, pass a longer timeout="
        )

    def _named(self, places: Sequence[int]) -> str:
        names = ", ".join(str(self._ranks[i]) for i in places[:8]) + (", ..." if len(places) > 8 else "")
        return f"rank{'s' * (len(places) > 1)} {names}"

    def _forget(self, keys: list[str]) -> None:
        """Delete the keys of the meeting before: all ranks have left it, since they have come to this one."""
        old, self._old = self._old, keys
        for key in old:
            self._store.delete_key(key)
