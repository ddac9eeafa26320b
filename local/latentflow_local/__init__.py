"""The embedded runtime: a workflow file's model servers and a gateway, as supervised processes of one machine."""
