"""A request from its arrival to its answer: scenarios, groups of instances, traces."""
