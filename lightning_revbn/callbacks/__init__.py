"""Lightning callbacks: thin, the work is done in `lightning_revbn.core`."""
