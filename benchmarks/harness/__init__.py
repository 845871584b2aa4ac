"""What the benchmarks one folder up share: models to run, processes to run them in, statistics, tables, plots."""
