import com.google.gerrit.launcher.GerritLauncher;

/** Runs a program of Gerrit (init, daemon, ...) from jars on the class path: there is no gerrit.war in Maven Central. */
public class GerritMain {
  public static void main(String[] words) throws Exception {
    int status = GerritLauncher.invokeProgram(GerritMain.class.getClassLoader(), words);
    // the daemon goes on in threads of its own
    if (status != 0 || !words[0].equals("daemon")) {
      System.exit(status);
    }
  }
}
