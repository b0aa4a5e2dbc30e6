"""The gRPC edge: listens, authenticates, checks requests, speaks proto outside and domain inside.

server.py        the port, its limits, reflection and health
interceptors.py  around every call: who calls, what it took, what went wrong
errors.py        one table: domain error -> status
validation.py    rules of the protos, page tokens, etags, update masks
names.py         resource names and the ids in them
tenancy.py       which tenant a call is about; changes of a tenant's configuration
conversion.py    proto <-> stored
*_service.py     one servicer each
"""
