"""The process and its neighbours: start, interrupts, preemption, logging."""
