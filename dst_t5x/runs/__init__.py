"""A run and its folder: from the plan to what it leaves."""
