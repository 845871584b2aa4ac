"""Who runs next: admission, waiting queue, policy and the scheduler. Numbers only, never a tensor or a clock."""
