"""The embedded runtime: runs the model servers of workflows and a gateway as supervised processes on one machine."""
