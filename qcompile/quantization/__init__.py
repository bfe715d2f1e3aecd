"""The one driver: a graph is planned, its ranges and codes are solved for, and the passes carry the plan out."""
