"""Trains and scores the shapes pack: a small Stable-Diffusion-shaped family that fits a CPU.

The model servers, the demo and the tests need weights whose pictures mean something; this package makes them
from nothing (it draws its own training set) and hands a folder that plain diffusers loads to everybody else.
"""
