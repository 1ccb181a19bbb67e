"""The report: a page that a person looks at, made of a recorded run. It needs bokeh, the extra `report`."""
