"""How many replicas each model gets: signals, a pure policy, and what acts on it. Knows neither kopf nor Kubernetes."""
