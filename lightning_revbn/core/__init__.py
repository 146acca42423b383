"""Plain PyTorch: find batch norm layers, write their scales, train the scales with lr / c. Never imports Lightning."""
