"""Alarms against injected faults: three small models, ten kinds of fault, detectors at equal rates of false alarms."""
