"""Manual against automatic gradients: a suite of workloads, in which everybody takes turns."""
