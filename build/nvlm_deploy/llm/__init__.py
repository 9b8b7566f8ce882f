"""Calibration and quantisation of the decoder."""
