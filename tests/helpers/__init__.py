"""What the tests share: small models, data, a quiet Trainer, references computed by hand, readers of logs."""
