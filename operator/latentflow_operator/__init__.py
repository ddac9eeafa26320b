"""The operator: reconciles DiffusionWorkflows into one Deployment for each distinct model."""
