"""Ways to switch the callback on without changing a script: an environment variable and a LightningCLI flag."""
