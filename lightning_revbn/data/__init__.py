"""The DataModule mixin that standardises inputs, and its helpers."""
