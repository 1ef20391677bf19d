"""What does each recurrent layer of a model receive on the probe, and which states does its cell visit?"""
