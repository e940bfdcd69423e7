"""Variants, one file each: a module-level VARIANT wires a system into the bench."""
