"""What the package costs, and zoos of models and strategies. Scripts, but for `benchmarks.gpu`, a module to run."""
