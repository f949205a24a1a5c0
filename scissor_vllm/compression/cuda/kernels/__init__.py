"""Triton kernels. Each file is one idea. Those of SCC follow each other like this:

    tokens (T, P, D)
      │ frames         usable rows · cosines inside frames · Prim's order of each frame
      │                (cuBLAS: dot products of tokens, once)
      ▼
    order, link, products
      │ threshold      check · wide intervals · first guess          ┐ a guess:
      │ pairs          runs at the guess · join those above it       │ repeated without
      │ threshold      count the components, make the next guess     ┘ the host
      ▼
    an interval whose count is K or more
      │ pairs          weights between its components
      │ spanning_tree  maximum spanning tree, its cut at K components
      │ threshold      the threshold inside the interval, flags
      ▼
    components
      │ parts          numbered in the paper's order, tokens grouped by part
      │ merge          means of parts · nearest part of each token · merged rows
      ▼
    K rows and the assignment (N,)

Average linkage has its own:

    tokens (N, D)
      │ distances      unit vectors as integers · distances inside windows
      │ linkage        copies joined · nearest group of each · all rounds, a program for each window
      ▼
    tree (parent, height), sorted by height
      │ tree           the groups that N - K merges leave · means of their rows
      ▼
    K rows and the assignment (N,)

``layout`` holds what host and kernels agree on, ``union_find`` the forest that passes join.
"""
