"""What everyone says to each other: messages, the signed envelope around them, and the topics they travel on.

Nothing here imports another room of the project, so a gateway, a broker, a ledger node and somebody else's program can
all stand on it. Everything is pure (bytes and values in, values out) except `mqtt_link`, the one MQTT shell, and
`keys.load_private_key` / `save_private_key`.
"""
