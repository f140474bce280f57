"use strict";
(() => {
  const live = document.getElementById("live");
  let looks = 0;
  const again = async () => {
    try {
      const answer = await fetch("/live");
      if (!answer.ok) throw new Error(answer.status);
      const page = await answer.text();
      // What somebody is about to copy stays.
      if (getSelection().isCollapsed) live.innerHTML = page;
      live.classList.remove("gone");
      live.dataset.looks = ++looks;
    } catch {
      live.classList.add("gone");
    }
    setTimeout(again, document.hidden ? 10000 : 1000);
  };
  setTimeout(again, 1000);
})();
