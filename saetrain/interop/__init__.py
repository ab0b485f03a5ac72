"""SAEs of other packages: one module a format. Each reads a checkpoint as a Foreign and writes an SAE as files."""
