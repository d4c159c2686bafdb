"""Processes: start and end, interrupts, preemption, logging."""
