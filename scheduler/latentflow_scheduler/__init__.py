"""Decides how many replicas each model gets: it reads signals and applies a pure policy.

Imports neither kopf nor Kubernetes.
"""
