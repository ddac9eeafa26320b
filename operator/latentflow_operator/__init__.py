"""The operator, which reconciles DiffusionWorkflows into one Deployment for each distinct model."""
