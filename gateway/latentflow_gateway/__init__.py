"""The gateway: admits requests, plans their stages, runs each on a replica, and passes handles from stage to stage."""
