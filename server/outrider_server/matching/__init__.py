"""Which subscriptions want an event: filters checked, compiled to Python, looked up in an index.

filter.py        CEL text -> checked AST, limits kept, errors with line and column
checked_ast.py   the stored bytes -> nodes
codegen.py       nodes -> the source of a Python function, two-valued, no exceptions; runtime.py is what it calls
predicate.py     one filter ready to be asked, generated or by the engine
event_types.py   names of event types and patterns over them
index.py         one tenant's subscriptions, immutable: match(event) -> targets
engine.py        the only module that knows the C++ CEL engine
"""
