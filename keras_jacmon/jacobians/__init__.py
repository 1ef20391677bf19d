"""What is the derivative of a cell's new states with respect to its old ones?"""
