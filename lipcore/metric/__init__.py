"""What every metric is made of: the protocol, results, distributions, states and the clock."""
