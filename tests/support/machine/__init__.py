"""What the stateful test is made of.

world.py writes as the application and the people in the CRM do, and looks at everything; memory.py keeps what only
somebody who watched can know; expectations.py says what a verification must find and a rollback must do, in plain
Python over what was seen, and shares no code with the project.
"""
