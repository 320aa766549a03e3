"use strict";
(() => {
  const board = document.getElementById("board");
  const stale = document.getElementById("stale");
  const pause = Number(board.dataset.refreshMs);
  async function refresh() {
    if (!document.hidden) {
      try {
        const answer = await fetch("/board.json", { cache: "no-store" });
        if (!answer.ok) throw new Error(String(answer.status));
        const update = await answer.json();
        if (update.revision !== board.dataset.revision) {
          board.innerHTML = update.html;
          board.dataset.revision = update.revision;
        }
        stale.hidden = true;
      } catch {
        stale.hidden = false;
      }
    }
    setTimeout(refresh, pause);
  }
  setTimeout(refresh, pause);
})();
