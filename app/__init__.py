"""The Streamlit app: pages only, every number and figure comes from the workbench package."""
