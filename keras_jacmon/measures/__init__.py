"""How large is a Jacobian?"""
