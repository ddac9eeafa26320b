"""The gateway: takes requests, plans their stages, sends each to a replica, and hands handles along."""
