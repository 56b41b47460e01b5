/* The theme shows a citation's paper in a box beside it, and leaves that box without a name. */
new MutationObserver((changes) => {
  for (const { addedNodes } of changes) {
    for (const box of addedNodes) {
      if (box.matches?.(".md-tooltip2[role=dialog]")) box.setAttribute("aria-label", "Paper")
    }
  }
}).observe(document.body, { childList: true })
