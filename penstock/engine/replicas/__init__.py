"""Several replicas of one model behind one queue: `ReplicatedEngine` and what it is made of."""
