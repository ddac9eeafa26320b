"""Trains and scores the shapes pack: a small Stable-Diffusion-shaped family that fits a CPU.

The model servers, the demo and the tests need weights whose pictures can be checked against the prompt. This package
draws its own training set, trains on it from random weights, and writes a folder that plain diffusers loads.
"""
