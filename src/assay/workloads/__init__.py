"""Workloads, one file each; a module-level WORKLOAD is found by its file's name."""
