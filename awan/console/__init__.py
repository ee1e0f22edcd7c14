"""Consoles: an instance's screen and keyboard in a browser.

`POST /instances/{uuid}/vnc` gives a ticket; with it a viewer opens the websocket `/console`, and the API process that
serves it relays the bytes of the node's VNC server. Nobody else reaches that server, and no password opens it but for
the moment in which a worker has unlocked it for exactly this opening.
"""
