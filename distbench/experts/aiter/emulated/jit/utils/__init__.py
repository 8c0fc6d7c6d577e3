"""Properties of the device."""
