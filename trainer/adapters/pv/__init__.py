"""PV-Tuning: integers and scales, trained in turn."""
