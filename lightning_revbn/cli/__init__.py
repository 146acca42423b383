"""The command `lightning-revbn`."""
