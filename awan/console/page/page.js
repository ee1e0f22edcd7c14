import RFB from "/console/novnc/core/rfb.js";

const status = document.getElementById("status");
const ctrlAltDel = document.getElementById("ctrl-alt-del");

// Ticket and password are taken out of the address at once: they are good for one use and not for the history.
const given = new URLSearchParams(location.hash.slice(1));
history.replaceState(null, "", location.pathname);

function say(text, { failed = false } = {}) {
  status.textContent = text;
  status.classList.toggle("failed", failed);
}

function connect(token, password) {
  const scheme = location.protocol === "https:" ? "wss:" : "ws:";
  const socket = new WebSocket(`${scheme}//${location.host}/api/v1/console?token=${encodeURIComponent(token)}`);
  socket.binaryType = "arraybuffer";
  let isShown = false;
  let closing = "";
  socket.addEventListener("close", (event) => { closing = event.reason; });

  const rfb = new RFB(document.getElementById("screen"), socket, { credentials: { password } });
  rfb.scaleViewport = true;
  rfb.focusOnClick = true;
  rfb.addEventListener("connect", () => {
    isShown = true;
    say("Connected");
    ctrlAltDel.disabled = false;
    rfb.focus();
  });
  rfb.addEventListener("desktopname", (event) => { document.title = `Console of ${event.detail.name}`; });
  rfb.addEventListener("securityfailure", () => { closing = "the password was not accepted"; });
  rfb.addEventListener("disconnect", () => {
    ctrlAltDel.disabled = true;
    const reason = closing || "the connection was lost";
    say(isShown
      ? `Closed: ${reason}.`
      : "The console could not be opened. Its ticket is good for one use within a minute: ask for a new one.",
    { failed: true });
  });
  ctrlAltDel.addEventListener("click", () => { rfb.sendCtrlAltDel(); rfb.focus(); });
}

if (given.get("token") && given.get("password")) {
  connect(given.get("token"), given.get("password"));
} else {
  say("Open this page with the address that the API gave for the console.", { failed: true });
}
