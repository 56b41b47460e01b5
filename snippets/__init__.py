"""Plain PyTorch modules, each equal to an independent reference; see the page of the same path."""
