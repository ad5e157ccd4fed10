"""A passport in the formats that others read: CycloneDX, SPDX, a Hugging Face card, the summary that the EU asks for.

Each says what the passport says and no more: what is unknown there is unknown here.
"""
