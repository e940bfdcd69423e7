"""Suites, one file each: the plans, with their options, KPIs and exports."""
