"""What everything stands on: whole files, checked arguments, processes, seeded generators, versions."""
